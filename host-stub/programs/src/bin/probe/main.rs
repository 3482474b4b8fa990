//! Asks the hypervisor for every page of RAM and touches, as the host's kernel, every page that is closed to the
//! host and many that are open: what the hypervisor says and what an access comes to must agree. With the argument
//! `registers`: reads registers of features that the hypervisor hides. With `break` and a kind: makes it break.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
mod probe;
#[cfg(target_os = "none")]
mod registers;

#[cfg(target_os = "none")]
host_programs::program!(probe::main);
