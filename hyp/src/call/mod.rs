//! Calls from outside: decoded once into typed values, checked, then served under the locks they need.
//!
//! | file | what it does |
//! |---|---|
//! | [`host`] | the calls of the host: from registers to an answer |
//! | [`locked`] | each transition of ownership and each top-up, with the locks that it takes |
//! | [`life`] | the life of a VM: creation, vCPUs, teardown |

#![forbid(unsafe_code)]

pub mod host;
pub mod life;
pub mod locked;

use crate::ownership::Error as OwnershipError;
use crate::pool::Lacking;
use abi::Error;
use abi::host::HostResult;

/// The one place where errors of the core become errors of the interface.
impl From<OwnershipError> for HostResult {
    fn from(error: OwnershipError) -> Self {
        use OwnershipError as E;
        let error = match error {
            E::Lacking(lacking) => return lacking.into(),
            E::BadRange => Error::Invalid,
            E::BeyondGuest => Error::Range,
            E::NotMemory | E::HostState(_) | E::HypState(_) | E::GuestState(_) | E::WrongVm => {
                Error::Permission
            }
            E::HostHasAccess(_) => Error::Again,
            E::Missing(_) | E::NoVm => Error::NoEntry,
            E::Poisoned(_) => Error::Poisoned,
            E::Pinned(_) | E::TooManyPins | E::TooManyBorrowers(_) => Error::Busy,
        };
        Self::refused(error)
    }
}

impl From<Lacking> for HostResult {
    fn from(lacking: Lacking) -> Self {
        Self::lacking(lacking.pool, lacking.pages)
    }
}

/// The result of a call about a range: the pages that were done.
pub(crate) fn pages(result: Result<u64, OwnershipError>) -> HostResult {
    match result {
        Ok(done) => HostResult::ok(&[done]),
        Err(error) => error.into(),
    }
}

/// The result of a call that returns nothing.
pub(crate) fn unit(result: Result<(), impl Into<HostResult>>) -> HostResult {
    match result {
        Ok(()) => HostResult::ok(&[]),
        Err(error) => error.into(),
    }
}
