//! The error codes of host calls.

/// Why a host call was refused. The number is that of the Linux error with the same meaning, so that a
/// host can hand it on; it travels negated in x1.
///
/// A refused call has changed nothing, except that a range call may have done whole chunks before the
/// one that was refused; their number of pages is in x2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Error {
    /// A page is not in the state that the transition starts from, or the caller may not ask for it.
    Permission = 1,
    /// No such VM or vCPU, or nothing is mapped at that guest address.
    NoEntry = 2,
    /// The other side must do something first; the same call may succeed later.
    Again = 11,
    /// Pages are lacking. x2 says how many, a power of two, and x3 to which pool ([`crate::page::Pool`]) to give
    /// them: contiguous pages aligned to their number will do. A top-up of records or of a VM may itself lack
    /// tables; one of tables so made never does.
    NoMemory = 12,
    /// The page is in use: pinned, or its VM or vCPU is running.
    Busy = 16,
    /// There is one already.
    Exists = 17,
    /// An argument is absurd: a count of zero, a range that overflows, leaves RAM or straddles regions.
    Invalid = 22,
    /// A guest address is beyond the guest's address space.
    Range = 34,
    /// The page was taken from the guest by force.
    Poisoned = 133,
}

impl Error {
    /// Every error, for tables and tests.
    pub const ALL: [Self; 9] = [
        Self::Permission,
        Self::NoEntry,
        Self::Again,
        Self::NoMemory,
        Self::Busy,
        Self::Exists,
        Self::Invalid,
        Self::Range,
        Self::Poisoned,
    ];

    /// The value of x1: the negated number.
    pub const fn to_word(self) -> u64 {
        -(self as u16 as i64) as u64
    }

    /// Reads x1 of a result: `Ok` for 0; `None` for a number that is no error of this interface.
    pub fn from_word(word: u64) -> Option<Result<(), Self>> {
        if word == 0 {
            return Some(Ok(()));
        }
        Self::ALL.into_iter().find(|error| error.to_word() == word).map(Err)
    }
}

impl core::fmt::Display for Error {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Permission => "not permitted in this state",
            Self::NoEntry => "no such VM, vCPU or page",
            Self::Again => "try again later",
            Self::NoMemory => "pages are lacking",
            Self::Busy => "in use",
            Self::Exists => "exists already",
            Self::Invalid => "invalid argument",
            Self::Range => "beyond the guest's address space",
            Self::Poisoned => "poisoned",
        })
    }
}

impl core::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_survives_its_word() {
        for error in Error::ALL {
            assert_eq!(Error::from_word(error.to_word()), Some(Err(error)));
        }
        assert_eq!(Error::from_word(0), Some(Ok(())));
        assert_eq!(Error::from_word(5), None);
    }

    #[test]
    fn every_error_has_words_of_its_own() {
        extern crate std;
        use std::string::ToString;
        let texts: std::collections::BTreeSet<_> = Error::ALL.iter().map(ToString::to_string).collect();
        assert_eq!(texts.len(), Error::ALL.len());
    }
}
