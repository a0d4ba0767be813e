//! Losses, AdamW, the learning rate, the trainer.
