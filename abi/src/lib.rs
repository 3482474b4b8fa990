//! What crosses an exception level in Deed.
//!
//! | module | what it defines |
//! |---|---|
//! | [`smccc`] | the calling convention: function ids, status values |
//! | [`host`] | the calls of the host, as typed values, with their encoding in registers |
//! | [`exit`] | why a vCPU stopped, as the host sees it |
//! | [`guest`] | the calls of a guest: KVM's vendor calls, in Android's range form |
//! | [`psci`] | power state coordination, for the host's relay and for guests |
//! | [`error`] | the error codes of host calls |
//! | [`page`] | page states and handles as words |
//! | [`tables`] | all of it as data, for documents and tools |
//!
//! Nothing here touches hardware, and nothing here trusts: decoding yields a typed *allegation* whose
//! numbers the hypervisor still has to check against memory and state.

#![no_std]
#![forbid(unsafe_code)]

pub mod error;
pub mod exit;
pub mod guest;
pub mod host;
pub mod page;
pub mod psci;
pub mod smccc;
pub mod tables;

pub use error::Error;
pub use exit::Exit;
pub use host::HostCall;
pub use page::{HostState, VmFlags, VmHandle};
