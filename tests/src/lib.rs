//! What tests across Deed's crates share.

pub mod pair;
pub mod real;
