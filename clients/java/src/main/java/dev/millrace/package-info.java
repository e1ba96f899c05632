/**
 * Millrace's client: streams what its engines generate. {@link dev.millrace.Client} is where to
 * begin; wire messages that are already what a caller wants ({@code dev.millrace.runtime.v1}, ...)
 * are returned as they are.
 */
package dev.millrace;
