//! Perplexity, exact answers, KL and agreement with a teacher.
