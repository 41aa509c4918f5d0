"""Proof of the kernels without a GPU: the emitted PTX interpreted, the emitted SASS modelled, budgets held."""
