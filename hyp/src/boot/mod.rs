//! What the boot loader left: found, checked, and turned into what the host gets. Nothing is written before
//! everything that was loaded is checked against everything else.
//!
//! | file | what it does |
//! |---|---|
//! | [`region`] | runs of bytes of physical memory |
//! | [`tree`] | reads from the device tree what Deed needs to know |
//! | [`image`] | reads the header of an arm64 Linux image |
//! | [`mod@plan`] | checks all parts against each other |
//! | [`blob`] | the bytes of a flattened device tree |
//! | [`edit`] | writes the host's device tree |
//!
//! Pure, and without trust in its input: a device tree that makes no sense is an error with a reason, never a
//! panic (invariant I8).

#![forbid(unsafe_code)]

pub mod blob;
pub mod edit;
pub mod image;
pub mod plan;
pub mod region;
#[cfg(test)]
mod sample;
pub mod tree;

pub use plan::{Plan, Problem, plan};
pub use region::Region;
