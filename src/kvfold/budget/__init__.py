"""What may be spent (budget.py) and what was spent (ledger.py). Plain integers, no tensors."""
