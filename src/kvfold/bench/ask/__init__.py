"""How a subject is asked: prompts, transcripts, replies, divergence."""
