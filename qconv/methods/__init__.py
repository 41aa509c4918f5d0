"""Methods: pure functions that turn a weight and the statistics of its inputs into a QTensor.

``rtn`` rounds to nearest and can search clipping ranges; ``awq`` searches scales that are folded into the operation
before; ``gptq`` rounds column by column, each column taking up the errors of those before it.

Methods know each other as little as files or architectures: what they share is :mod:`qconv.core.rounding`.
"""
