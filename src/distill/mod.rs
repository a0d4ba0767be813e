//! The whole procedure: importance, placement, initialisation, stages.
