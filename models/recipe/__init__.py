"""From installed Python sources to a served model: data, tokenizer, training, evaluation, model card."""
