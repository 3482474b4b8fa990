//! Allocations that fail when a test says so: table pages of the host's pool and of a VM's, records.
//!
//! What a pool gives is reserved by a look at what it has, before anything is changed, so an allocation fails there:
//! the look finds too little. Each thread, and so each CPU, has a schedule of its own. Nothing of this is in an image.

use abi::page::Pool;
use core::cell::Cell;

std::thread_local! {
    /// Allocations until the one that fails, which is number 1.
    static LEFT: Cell<Option<u64>> = const { Cell::new(None) };
    static FAILED: Cell<Option<Pool>> = const { Cell::new(None) };
}

/// Makes the `k`-th allocation of this thread from now fail, 1 being the next. Later ones succeed.
pub(super) fn fail(k: u64) {
    LEFT.set(Some(k.max(1)));
    FAILED.set(None);
}

/// Lets all allocations succeed again. Returns the pool whose allocation failed, if one did.
pub(super) fn stop() -> Option<Pool> {
    LEFT.set(None);
    FAILED.take()
}

/// Whether a reservation of so many pages, or of one record, has to fail. Counts them.
pub(crate) fn refuses(pool: Pool, allocations: u64) -> bool {
    let Some(left) = LEFT.get() else { return false };
    let refused = allocations > 0 && left <= allocations;
    LEFT.set(if refused { None } else { left.checked_sub(allocations) });
    if refused {
        FAILED.set(Some(pool));
    }
    refused
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn just_the_allocation_that_was_chosen_fails() {
        let run = |k| {
            fail(k);
            let answers = [(Pool::Tables, 2), (Pool::Vm, 0), (Pool::Vm, 1), (Pool::Metadata, 1)]
                .map(|(pool, count)| refuses(pool, count));
            (answers.iter().position(|refused| *refused), stop())
        };
        assert_eq!(run(1), (Some(0), Some(Pool::Tables)));
        assert_eq!(run(2), (Some(0), Some(Pool::Tables)));
        assert_eq!(run(3), (Some(2), Some(Pool::Vm)));
        assert_eq!(run(4), (Some(3), Some(Pool::Metadata)));
        assert_eq!(run(5), (None, None));
        assert!(!refuses(Pool::Tables, 100), "no schedule, no failure");
    }
}
