"""Token ids to segments, the units that are folded: where a turn begins and ends. Plain integers, no tensors."""
