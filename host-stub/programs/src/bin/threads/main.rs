//! Threads on all CPUs, each story as the argument says: `work`, `memory`, `guests`, `vcpus`, `unshare`, `reset`.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
extern crate alloc;

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
mod guests;
#[cfg(target_os = "none")]
mod memory;
#[cfg(target_os = "none")]
mod run;

#[cfg(target_os = "none")]
host_programs::program!(run::main);
