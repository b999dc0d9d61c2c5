"""A CPU's kernel for the decoder layers of a few rows, compiled at the first start by the machine's C compiler.

Nothing here is needed: where it does not compile, or does not calculate what torch does, torch's operations serve.
"""
