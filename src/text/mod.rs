//! Tokenizer, data sets, packing into segments.
