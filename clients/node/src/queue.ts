// What one part of the client hands to another, without a limit.

/** A queue with one reader. */
export class Queue<Item> implements AsyncIterable<Item> {
  private readonly items: Item[] = [];
  private hasEnded = false;
  private failure: Error | undefined;
  private wake = () => {};

  /** Adds an item; nothing is added to a queue that has ended. */
  push(item: Item): void {
    if (this.hasEnded) return;
    this.items.push(item);
    this.wake();
  }

  /** Ends it: its reader gets what was pushed, and then this failure if there is one. */
  end(failure?: Error): void {
    if (this.hasEnded) return;
    this.hasEnded = true;
    this.failure = failure;
    this.wake();
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<Item> {
    for (;;) {
      while (this.items.length > 0) yield this.items.shift()!;
      if (this.failure !== undefined) throw this.failure;
      if (this.hasEnded) return;
      await new Promise<void>((resolve) => (this.wake = resolve));
    }
  }
}
