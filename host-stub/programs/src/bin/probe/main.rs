//! Touches every page of RAM as the host's kernel, reading, and every page that the hypervisor says is not the
//! host's, writing too: what the hypervisor says and what an access comes to must agree everywhere.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
mod probe;

#[cfg(target_os = "none")]
host_programs::program!(probe::main);
