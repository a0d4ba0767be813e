//! The shape of a model, read from a `config.json`.
