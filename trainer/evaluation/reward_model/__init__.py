"""A reward model is judged: steps located, tokens credited, answers chosen, values that mean what they say."""
