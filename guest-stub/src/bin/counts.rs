//! Counts the instructions of a guest's calls and waits, EL2 and whoever serves it included: for an emulator
//! whose counter advances by one for each. With argument 1 its VM unshares at once.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
guest_stub::guest!(image::main);

#[cfg(target_os = "none")]
mod image {
    use abi::guest::{
        FEATURES, MEM_RELINQUISH, MEM_SHARE, MEM_UNSHARE, MMIO_GUARD_MAP, MMIO_GUARD_UNMAP, PTP,
    };
    use abi::smccc::{INVALID_PARAMETER, SUCCESS};
    use guest_stub::arch::{store64, timed_hvc, timed_store64};
    use guest_stub::device::Device;
    use guest_stub::protocol::{DATA, DEVICE_BASE, PAGE_SIZE, RAM_BASE, STRANGER_BASE};

    /// A page that is shared and unshared.
    const PAGE: u64 = RAM_BASE + 0x10_0000;
    /// Pages that nobody has touched, each run of them in one table.
    const TOUCHED: u64 = RAM_BASE + 0x20_0000;
    const SHARED: u64 = RAM_BASE + 0x30_0000;
    const FRESH_PAGES: u64 = 256;
    /// Runs of what can be done any number of times, and of what the VMM serves.
    const RUNS: u64 = 10_000;
    const SERVED_RUNS: u64 = 1000;
    /// What an interval with nothing in it reads.
    const EMPTY: u64 = 1;

    /// Counts of one operation.
    struct Row {
        operation: &'static str,
        least: u64,
        sum: u64,
        runs: u64,
    }

    impl Row {
        fn new(operation: &'static str) -> Self {
            Self { operation, least: u64::MAX, sum: 0, runs: 0 }
        }

        fn note(&mut self, interval: u64) {
            let count = interval - EMPTY;
            self.least = self.least.min(count);
            self.sum += count;
            self.runs += 1;
        }

        /// Makes a range call of one page, or another call, that must return this.
        fn call(&mut self, function: u32, ipa: u64, expected: u64) {
            let (interval, [x0, ..]) = timed_hvc([function.into(), ipa, 1, 0, 0, 0, 0]);
            assert!(x0 == expected, "{}: {x0:#x}", self.operation);
            self.note(interval);
        }

        fn report(&self, device: &mut Device) {
            device.row(self.operation, self.least, self.sum, self.runs);
        }
    }

    pub(super) fn main(argument: u64) {
        let mut device = Device::enrol();
        if argument == 1 {
            answered_at_once(&mut device);
        } else {
            served(&mut device);
            asked(&mut device);
        }
    }

    /// What EL2 answers alone.
    fn answered_at_once(device: &mut Device) {
        let mut features = Row::new("guest call answered at EL2 (FEATURES)");
        let mut share = Row::new("guest MEM_SHARE");
        let mut unshare = Row::new("guest MEM_UNSHARE, immediate form");
        let mut refused = Row::new("guest MEM_UNSHARE refused");
        store64(PAGE, 0);
        for _ in 0..RUNS {
            features.call(FEATURES, 0, abi::guest::PROTECTED_FEATURES);
            share.call(MEM_SHARE, PAGE, SUCCESS);
            unshare.call(MEM_UNSHARE, PAGE, SUCCESS);
            refused.call(MEM_UNSHARE, PAGE, INVALID_PARAMETER);
        }
        let mut mapped = Row::new("guest MMIO_GUARD_MAP");
        let mut unmapped = Row::new("guest MMIO_GUARD_UNMAP");
        for _ in 0..RUNS {
            mapped.call(MMIO_GUARD_MAP, STRANGER_BASE, SUCCESS);
            unmapped.call(MMIO_GUARD_UNMAP, STRANGER_BASE, SUCCESS);
        }
        let mut relinquished = Row::new("guest MEM_RELINQUISH, wiped");
        for page in 0..FRESH_PAGES {
            store64(TOUCHED + page * PAGE_SIZE, 0);
            relinquished.call(MEM_RELINQUISH, TOUCHED + page * PAGE_SIZE, SUCCESS);
        }
        [mapped, unmapped, relinquished].iter().for_each(|row| row.report(device));
        [features, share, unshare, refused].iter().for_each(|row| row.report(device));
    }

    /// What the host or the VMM serves.
    fn served(device: &mut Device) {
        let mut forwarded = Row::new("guest call served by the host, round trip");
        let mut emulated = Row::new("guest MMIO served by the VMM, round trip");
        for _ in 0..SERVED_RUNS {
            forwarded.call(PTP, 0, abi::smccc::NOT_SUPPORTED);
            emulated.note(timed_store64(DEVICE_BASE + DATA));
        }
        let mut touched = Row::new("guest first touch of a page, through the host");
        let mut shared = Row::new("guest MEM_SHARE of an unmapped page, through the host");
        for page in 0..FRESH_PAGES {
            touched.note(timed_store64(TOUCHED + page * PAGE_SIZE));
            shared.call(MEM_SHARE, SHARED + page * PAGE_SIZE, SUCCESS);
        }
        [forwarded, emulated, touched, shared].iter().for_each(|row| row.report(device));
    }

    /// What the host is asked for first.
    fn asked(device: &mut Device) {
        let mut share = Row::new("MEM_SHARE");
        let mut unmapped = Row::new("guest MEM_UNSHARE that asks, page not mapped");
        let mut mapped = Row::new("guest MEM_UNSHARE that asks, page mapped by the VMM");
        store64(PAGE, 0);
        for _ in 0..SERVED_RUNS {
            share.call(MEM_SHARE, PAGE, SUCCESS);
            unmapped.call(MEM_UNSHARE, PAGE, SUCCESS);
            share.call(MEM_SHARE, PAGE, SUCCESS);
            // The VMM touches it.
            device.phase(1, &[PAGE]);
            mapped.call(MEM_UNSHARE, PAGE, SUCCESS);
        }
        [unmapped, mapped].iter().for_each(|row| row.report(device));
    }
}
