//! The only place with registers, assembly and most `unsafe`: what makes the core run at EL2.
//!
//! | module | what it does |
//! |---|---|
//! | [`boot`] | from the boot loader to the host's first instruction (boot.S, boot.rs) |
//! | [`secondary`] | the same for the other CPUs, and what the host asks of CPUs |
//! | [`early`] | the tables under which EL2 boots |
//! | [`mmu`] | EL2's own translation regime |
//! | [`layout`] | the parts of the image, and the stacks |
//! | [`exceptions`] | what the host's exceptions mean (vectors.S, exceptions.rs) |
//! | [`host`] | how EL1 is set up for the host |
//! | [`id_registers`] | identification registers as the host sees them |
//! | [`traps`], [`world_switch`] | trap registers of guests; into a guest and back |
//! | [`el2`] | [`crate::machine::Machine`] for EL2 |
//! | [`fixmap`] | the only way to a page that is not the hypervisor's |
//! | [`cache`], [`instructions`], [`registers`] | one-instruction wrappers |
//! | [`features`] | what the CPU has |
//! | [`console`], [`panic`], [`power`], [`verdict`] | what is said, and how it ends |

#![expect(unsafe_code, reason = "registers and instructions of EL2 can be reached in no other way")]
#![expect(
    clippy::arithmetic_side_effects,
    reason = "addresses of the image's own parts and register fields; numbers from outside are checked in the core"
)]

pub mod boot;
pub mod cache;
pub mod console;
pub mod early;
pub mod el2;
pub mod exceptions;
pub mod features;
pub mod fixmap;
pub mod host;
pub mod id_registers;
pub mod instructions;
pub mod layout;
pub mod mmu;
pub mod panic;
pub mod power;
pub mod registers;
pub mod secondary;
pub mod traps;
pub mod verdict;
pub mod world_switch;
