"""Language models, soft prompts and their losses; the only importer of transformers and peft."""
