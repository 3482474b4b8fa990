//! The commands, one file each. All return whether everything passed; an error means that the run itself
//! could not be made.

pub(crate) mod abi;
pub(crate) mod bench;
pub(crate) mod coverage;
pub(crate) mod fuzz;
pub(crate) mod lint;
pub(crate) mod model;
pub(crate) mod mutants;
pub(crate) mod qemu;
pub(crate) mod setup;
pub(crate) mod test;
