//! What tests across Deed's crates share.

pub mod graph;
pub mod pair;
pub mod real;
#[cfg(deed_shuttle)]
pub mod threads;
