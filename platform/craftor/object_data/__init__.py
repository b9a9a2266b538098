"""Pictures of objects in folders -> captions and masks for each, then the rows that an object encoder trains on."""
