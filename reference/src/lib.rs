//! Every op of h1, forward and backward, as a pure function over ndarray.
