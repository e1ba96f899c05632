"""Compiles the kernels of these tests without a GPU, into build/gpu-tests.

python -m tests.gpu.prebuild --arch sm_90
"""

import argparse

from kernels.lowering import variants
from shared.arch import ARCHES, arch_named
from tests.gpu.device import compiled, prebuilt_folder
from tests.gpu.test_executor_on_gpu import GRAPHS, TUNED, tiny_graph
from tests.gpu.test_kernels_on_gpu import collected
from tests.gpu.test_model_runner_on_gpu import sampler_variants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="sm_90")
    arch = arch_named(parser.parse_args().arch)
    named = {(quant, False, kv_cache) for quant, kv_cache in TUNED} | {of[:3] for of in GRAPHS}
    graphs = [tiny_graph(*of) for of in sorted(named)]
    tiny = [variants(graph, arch, with_candidates=True) for graph in graphs]
    jobs = [(wanted, arch) for wanted in (sampler_variants(), *tiny)]
    # Those of an older arch are run from its PTX.
    jobs += [(collected(each).variants, each) for each in (arch, ARCHES["sm_80"])]
    for wanted, arch in jobs:
        folder = prebuilt_folder(wanted, arch)
        if folder.is_dir():
            continue
        index, code = compiled(wanted, arch)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "index.json").write_bytes(index)
        (folder / "code.bin").write_bytes(code)


if __name__ == "__main__":
    main()
