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
impl From<OwnershipError> for Error {
    fn from(error: OwnershipError) -> Self {
        use OwnershipError as E;
        match error {
            E::Lacking(_) => Self::NoMemory,
            E::BadRange => Self::Invalid,
            E::BeyondGuest => Self::Range,
            E::NotMemory | E::HostState(_) | E::HypState(_) | E::GuestState(_) | E::WrongVm => {
                Self::Permission
            }
            E::HostHasAccess(_) => Self::Again,
            E::Missing(_) | E::NoVm => Self::NoEntry,
            E::Poisoned(_) => Self::Poisoned,
            E::Pinned(_) | E::TooManyPins | E::TooManyBorrowers(_) => Self::Busy,
        }
    }
}

impl OwnershipError {
    /// What x2 and x3 say of a refusal: how many pages are lacking, and in which pool.
    pub fn words(self) -> [u64; 2] {
        match self {
            Self::Lacking(Lacking { pool, pages }) => [pages, pool as u64],
            _ => [0, 0],
        }
    }
}

impl From<OwnershipError> for HostResult {
    fn from(error: OwnershipError) -> Self {
        Self { outcome: Err(error.into()), ..Self::ok(&error.words()) }
    }
}

impl From<Lacking> for HostResult {
    fn from(lacking: Lacking) -> Self {
        OwnershipError::from(lacking).into()
    }
}

/// The result of a call that returns nothing.
pub(crate) fn unit(result: Result<(), impl Into<HostResult>>) -> HostResult {
    match result {
        Ok(()) => HostResult::ok(&[]),
        Err(error) => error.into(),
    }
}
