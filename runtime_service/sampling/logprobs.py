"""How likely tokens were, by the logits as the model gave them."""

import torch

from runtime_service.scheduling.output import TokenLogprobs


def token_logprobs(
    logits_RV: torch.Tensor, token_ids: list[int], num_top: int
) -> tuple[TokenLogprobs, ...]:
    """One record per row: its token's log probability and rank, and the likeliest tokens.

    Args:
        logits_RV: any float dtype; the softmax is computed in fp32.
        token_ids: one per row.
        num_top: candidates to list; 0 lists none.
    """
    values_RV = logits_RV.float()
    chosen_R1 = torch.tensor(token_ids, device=logits_RV.device)[:, None]
    chosen_logits_R1 = values_RV.gather(1, chosen_R1)
    normalizers_R1 = values_RV.logsumexp(1, keepdim=True)
    logprobs = (chosen_logits_R1 - normalizers_R1).flatten().tolist()
    ranks = ((values_RV > chosen_logits_R1).sum(1) + 1).tolist()
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(token_ids)
    if num_top:
        top = values_RV.topk(min(num_top, values_RV.shape[1]), dim=1)
        values, indices = (top.values - normalizers_R1).tolist(), top.indices.tolist()
        tops = [tuple(zip(i, v, strict=True)) for i, v in zip(indices, values, strict=True)]
    return tuple(
        TokenLogprobs(token, logprob, rank, candidates)
        for token, logprob, rank, candidates in zip(token_ids, logprobs, ranks, tops, strict=True)
    )
