"""Ways of training and of editing a trained model, ours among them; one file each."""
