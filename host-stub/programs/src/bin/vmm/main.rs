//! The default scenario, told step by step: a guest in memory that the host gave it keeps a secret, shares
//! and takes back, while the host pries; then it ends, and nothing is left of it.
//!
//! Arguments: `secret-nonce=HEX` of the run; `--leave-running` and `--reset-running` power off and reset with
//! the guest alive, so that the hypervisor must wipe it.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
mod hostility;
#[cfg(target_os = "none")]
mod story;

#[cfg(target_os = "none")]
host_programs::program!(story::main);
