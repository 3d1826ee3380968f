"""Training: the base models, SONIC's adapter and DynaKV's ranks.

Reading order: loop (steps, schedule, checkpoints), optimisers, muon, losses, run (what all kinds of training share);
then base/ (run, curriculum, batches, loss, warmstart, vocabulary, score, card), sonic/ (run, talks, talk_batch,
parallel_masks, loss) and dynakv/ (run, calibrate, student, loss). Imports transformers only through `kvfold.hf`; the
benchmarks of plans live in bench/.
"""
