"""Where models come from: any checkpoint, as Hugging Face names and spells it."""
