"""Low rank: slots in few latent dimensions; their layout, their pages in a tier, their gate and their ranks."""
