//! The guest's calls: KVM's vendor calls in Android's range form, and PSCI.

use crate::arch;

/// What a range call did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeResult {
    /// x0: `SUCCESS` or a negative status.
    pub status: u64,
    /// x1: pages done.
    pub done: u64,
}

/// Calls with a function id and up to three arguments; returns x0 to x3.
pub fn call(function: u32, a: u64, b: u64, c: u64) -> [u64; 4] {
    arch::hvc([u64::from(function), a, b, c, 0, 0, 0])
}

/// One range call: `pages` pages from `ipa` on. It may do fewer pages than asked.
pub fn range(function: u32, ipa: u64, pages: u64) -> RangeResult {
    let [status, done, ..] = call(function, ipa, pages, 0);
    RangeResult { status, done }
}

/// Range calls until all pages are done; returns the first status that is not success, or success.
pub fn whole_range(function: u32, ipa: u64, pages: u64) -> u64 {
    let mut done = 0;
    while done < pages {
        let result = range(function, ipa + done * crate::protocol::PAGE_SIZE, pages - done);
        if result.status != abi::smccc::SUCCESS {
            return result.status;
        }
        if result.done == 0 || result.done > pages - done {
            return abi::smccc::INVALID_PARAMETER;
        }
        done += result.done;
    }
    abi::smccc::SUCCESS
}

/// Lets the host access pages.
pub fn share(ipa: u64, pages: u64) -> u64 {
    whole_range(abi::guest::MEM_SHARE, ipa, pages)
}

/// Takes shared pages back; they are private again when this returns success.
pub fn unshare(ipa: u64, pages: u64) -> u64 {
    whole_range(abi::guest::MEM_UNSHARE, ipa, pages)
}

/// Gives pages back to the host, wiped.
pub fn relinquish(ipa: u64, pages: u64) -> u64 {
    whole_range(abi::guest::MEM_RELINQUISH, ipa, pages)
}

/// Powers the guest off for good.
pub fn system_off() -> ! {
    call(abi::psci::SYSTEM_OFF, 0, 0, 0);
    loop {
        arch::wait_for_event();
    }
}
