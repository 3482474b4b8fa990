//! Runs the guests that test the hypervisor from inside, each as the argument says:
//! `registers`, `survey`, `psci`, `smccc`, `memory`, `poison`, `immediate`, `mmio`, `unguarded`, `traps`, `spin`, `plain`;
//! or, as `own`, one that is none of Deed's.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
mod memory;
#[cfg(target_os = "none")]
mod own;
#[cfg(target_os = "none")]
mod plain;
#[cfg(target_os = "none")]
mod run;
#[cfg(target_os = "none")]
mod several;

#[cfg(target_os = "none")]
host_programs::program!(run::main);
