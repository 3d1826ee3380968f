"""The budget of a cache (budget.py), and the sizes that it really has (ledger.py). Plain integers, no tensors."""
