"""Training: the base models, and later the learned members of a plan.

Reading order: base (one run), curriculum (what is learnt when), batches, losses, loop, muon, warmstart; then vocabulary
(the tokenizer's texts), score (held-out scores) and card (what a run leaves behind). Imports transformers only through
`kvfold.hf`; the benchmarks of plans live in bench/.
"""
