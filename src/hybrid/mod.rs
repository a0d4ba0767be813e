//! The conversion of attention weights into Mamba weights.
