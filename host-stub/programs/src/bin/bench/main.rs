//! Counts the instructions of each operation: `cargo xtask bench`.
//!
//! Needs an emulator that advances the counter by one for each instruction; that is checked first. One `ROW` for
//! each operation, with the least instructions of a run, those of all runs, and the number of runs.
//! Arguments: `boot` (what the boot alone costs), `blocks` (donations of 2 MiB), or none for all else.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
extern crate alloc;

#[cfg(target_os = "none")]
mod code;
#[cfg(target_os = "none")]
mod entries;
#[cfg(target_os = "none")]
mod guests;
#[cfg(target_os = "none")]
mod host;
#[cfg(target_os = "none")]
mod memfd;
#[cfg(target_os = "none")]
mod others;
#[cfg(target_os = "none")]
mod run;

#[cfg(target_os = "none")]
host_programs::program!(run::main);
