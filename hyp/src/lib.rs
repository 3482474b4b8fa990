//! Deed's hypervisor: one kind of truth, who owns every page of memory and who else may touch it.
//!
//! | module | the one rule that it keeps |
//! |---|---|
//! | [`addr`] | an address cannot leave its space, nor be taken for one of another space |
//! | [`memory`] | only RAM that nobody else claims may change hands |
//! | [`machine`] | the core touches hardware through one trait |
//! | [`pgtable`] | a live translation changes through break-before-make, in one function |
//! | [`ownership`] | check, reserve, commit: a transition that fails changes nothing |
//! | [`pool`] | memory of the hypervisor is counted, and its lack is an answer |
//! | [`vm`] | a handle names one VM for ever; a vCPU is one CPU's at a time |
//! | [`call`] | a number from outside is an allegation until it is checked |
//! | [`sync`] | a lock is taken in its place in the order, and tests see to it |
//! | `watch`, `oracle` | whoever watches a transition sees it under its locks, and changes nothing |
//! | [`hypervisor`] | all locks stand in one place and are taken in one order |
//! | `events` | test builds: what was done to tables and TLBs is remembered in order |
//! | [`exception`] | EL1 finds what the architecture's own exception entry would leave |
//! | [`psci`], [`smc`] | what is not known does not reach the firmware |
//! | [`boot`] | nothing is written before everything that was loaded is checked |
//! | `arch` | the only place with registers and assembly |
//!
//! The crate builds for the build machine, where its tests run on a simulated one, and for EL2.

#![cfg_attr(not(any(test, feature = "sim")), no_std)]
#![deny(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![cfg_attr(
    test,
    expect(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        reason = "a test that is wrong should stop there"
    )
)]

pub mod addr;
#[cfg(all(target_arch = "aarch64", target_os = "none"))]
pub mod arch;
pub mod boot;
pub mod call;
pub mod cpus;
#[cfg(feature = "test-calls")]
pub mod events;
pub mod exception;
pub mod hypervisor;
pub mod machine;
pub mod memory;
// Its lock would be held while shuttle schedules another CPU.
#[cfg(all(feature = "oracle", not(deed_shuttle)))]
pub mod oracle;
pub mod ownership;
pub mod pgtable;
pub mod pool;
pub mod psci;
pub mod smc;
pub mod sync;
#[cfg(any(test, feature = "sim"))]
pub mod testing;
pub mod vm;
mod watch;

// A part of `arch` that is values alone, without registers: its tests run here.
#[cfg(test)]
#[expect(dead_code, unreachable_pub, reason = "the world switch, which uses them, is not built here")]
#[path = "arch/traps.rs"]
mod traps;

pub use hypervisor::{Hypervisor, Mapping, Setup, SetupError};

/// Stops the machine: an invariant that no value from outside can break is broken, so there is no state left
/// that could be trusted (docs/architecture.md, Failure).
#[cold]
#[track_caller]
#[expect(clippy::panic, reason = "the panic handler prints what is known and stops all CPUs")]
pub(crate) fn broken(what: &str) -> ! {
    panic!("broken invariant: {what}")
}
