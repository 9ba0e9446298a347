"""Transform coding: a subspace's latents in few bits each, and a decoder fitted to what the bits can say."""
