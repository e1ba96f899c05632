// Whether and when a failed call is tried again.

import { isLostCall, type MillraceError } from "./errors.js";

/** How patient a client is. */
export class Retries {
  /**
   * @param maxAttempts calls in all; 1 never tries again.
   * @param firstDelayS doubles with each attempt, where the daemon does not name a delay.
   * @param maxDelayS a daemon that asks for a longer wait is not waited for.
   */
  constructor(
    readonly maxAttempts = 4,
    readonly firstDelayS = 0.1,
    readonly maxDelayS = 30,
  ) {}

  /**
   * How long to wait before another try; undefined where there is to be none.
   *
   * @param attempt calls made so far, at least 1.
   */
  delayS(error: MillraceError, attempt: number): number | undefined {
    if (attempt >= this.maxAttempts) return undefined;
    let delayS = error.retryAfterS;
    if (delayS === undefined && isLostCall(error)) delayS = this.firstDelayS * 2 ** (attempt - 1);
    if (delayS === undefined || delayS > this.maxDelayS) return undefined;
    // Spread out, so that refused clients do not come back all at once.
    return delayS * (1 + Math.random() / 4);
  }
}
