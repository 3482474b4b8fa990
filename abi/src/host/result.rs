//! What a call of the host returns, and its registers.

use super::RESULT_WORDS;
use crate::error::Error;
use crate::page::{HostState, Pool};

/// What a served call returns: pages done even when it failed in the middle of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostResult {
    /// 0 or why not.
    pub outcome: Result<(), Error>,
    /// x2 to x9.
    pub values: [u64; RESULT_WORDS - 2],
}

impl HostResult {
    /// A success that returns these values.
    pub fn ok(results: &[u64]) -> Self {
        let mut values = [0; RESULT_WORDS - 2];
        for (value, result) in values.iter_mut().zip(results) {
            *value = *result;
        }
        Self { outcome: Ok(()), values }
    }

    /// A refusal, which has done nothing.
    pub fn refused(error: Error) -> Self {
        Self { outcome: Err(error), ..Self::ok(&[]) }
    }

    /// Refused for lack of pages: `pages` of them to `pool` will do.
    pub fn lacking(pool: Pool, pages: u64) -> Self {
        Self { outcome: Err(Error::NoMemory), ..Self::ok(&[pages, pool as u64]) }
    }

    /// The values of x1 to x9.
    pub fn to_words(self) -> [u64; RESULT_WORDS - 1] {
        let mut words = [0; RESULT_WORDS - 1];
        let (first, rest) = words.split_at_mut(1);
        first.fill(match self.outcome {
            Ok(()) => 0,
            Err(error) => error.to_word(),
        });
        rest.copy_from_slice(&self.values);
        words
    }

    /// Reads x0 to x9; `None` if the call is not supported or the error is unknown.
    pub fn from_words(words: &[u64; RESULT_WORDS]) -> Option<Self> {
        let [x0, x1, values @ ..] = *words;
        if x0 != crate::smccc::SUCCESS {
            return None;
        }
        Some(Self { outcome: Error::from_word(x1)?, values })
    }

    /// State of the page, from the result of [`HostCall::QueryPage`](super::HostCall::QueryPage).
    pub fn host_state(&self) -> Option<HostState> {
        HostState::from_word(self.values[0])
    }
}

impl From<Error> for HostResult {
    fn from(error: Error) -> Self {
        Self::refused(error)
    }
}
