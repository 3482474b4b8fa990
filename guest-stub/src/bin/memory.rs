//! What a guest does with its own memory: share, unshare and relinquish, in ranges, with good and absurd
//! arguments. With argument 1 it touches an address where there is no memory; with 2 it loses a page by force.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
guest_stub::guest!(image::main);

#[cfg(target_os = "none")]
mod image {
    use abi::guest::{MEM_RELINQUISH, MEM_SHARE, MEM_UNSHARE, MMIO_GUARD_MAP};
    use abi::smccc::{INVALID_PARAMETER, SUCCESS};
    use guest_stub::arch::{CLASS_DATA_ABORT, STATUS_EXTERNAL, attempt, load64, store64};
    use guest_stub::call::{call, range, relinquish, share, unshare};
    use guest_stub::device::Device;
    use guest_stub::protocol::{DEVICE_BASE, GREETING, PAGE_SIZE, RAM_BASE, RAM_SIZE};

    const FRESH: u64 = RAM_BASE + 0x10_0000;
    const ABSENT: u64 = RAM_BASE + 0x15_0000;
    const RANGE: u64 = RAM_BASE + 0x18_0000;
    /// Where one table of the last level ends and the next begins.
    const TABLE_END: u64 = RAM_BASE + 0x20_0000;
    const GIVEN: u64 = RAM_BASE + 0x30_0000;

    pub(super) fn main(argument: u64) {
        let mut device = Device::enrol();
        if argument == 1 {
            device.phase(1, &[]);
            load64(RAM_BASE + RAM_SIZE);
            return;
        }
        if argument == 2 {
            taken_by_force(&mut device);
            return;
        }
        fresh_memory(&mut device);
        single_pages(&mut device);
        ranges(&mut device);
        absurd(&mut device);
        given_back(&mut device);
    }

    fn fresh_memory(device: &mut Device) {
        let words = (0..64 * PAGE_SIZE).step_by(8).filter(|offset| load64(FRESH + offset) != 0);
        device.check("fresh-memory-reads-zeros", 0, words.count() as u64);
    }

    fn single_pages(device: &mut Device) {
        let first = range(MEM_SHARE, ABSENT, 1);
        device.check("sharing-a-page-that-is-not-there-yet-succeeds", SUCCESS, first.status);
        device.check("one-page-is-done", 1, first.done);
        device.check("sharing-it-again-is-refused", INVALID_PARAMETER, share(ABSENT, 1));
        device.check("relinquishing-a-shared-page-is-refused", INVALID_PARAMETER, relinquish(ABSENT, 1));
        device.check("unsharing-it-succeeds", SUCCESS, unshare(ABSENT, 1));
        device.check("unsharing-it-again-is-refused", INVALID_PARAMETER, unshare(ABSENT, 1));
        let absent = RAM_BASE + RAM_SIZE - PAGE_SIZE;
        device.check("unsharing-a-page-that-is-not-there-is-refused", INVALID_PARAMETER, unshare(absent, 1));
        let legacy = range(MEM_SHARE, ABSENT, 0);
        device.check(
            "a-count-of-zero-means-one-page",
            1,
            if legacy.status == SUCCESS { legacy.done } else { 0 },
        );
        device.check("and-that-page-is-shared", SUCCESS, unshare(ABSENT, 1));
    }

    fn ranges(device: &mut Device) {
        device.check("sharing-five-pages-succeeds", SUCCESS, share(RANGE, 5));
        device.check("unsharing-more-than-is-shared-is-refused", INVALID_PARAMETER, unshare(RANGE, 6));
        device.check("and-has-changed-nothing", INVALID_PARAMETER, share(RANGE, 1));
        device.check(
            "sharing-over-a-shared-page-is-refused",
            INVALID_PARAMETER,
            share(RANGE + 4 * PAGE_SIZE, 2),
        );
        device.check(
            "and-has-not-shared-the-other-page",
            INVALID_PARAMETER,
            unshare(RANGE + 5 * PAGE_SIZE, 1),
        );
        device.check("unsharing-two-of-five-succeeds", SUCCESS, unshare(RANGE + PAGE_SIZE, 2));
        device.check("unsharing-over-the-gap-is-refused", INVALID_PARAMETER, unshare(RANGE, 5));
        device.check("the-first-page-is-still-shared", SUCCESS, unshare(RANGE, 1));
        device.check("and-the-last-two", SUCCESS, unshare(RANGE + 3 * PAGE_SIZE, 2));
        let across = TABLE_END - 3 * PAGE_SIZE;
        // The pages must be there: a call that lacks one ends with it.
        (0..8).for_each(|page| store64(across + page * PAGE_SIZE, page));
        let first = range(MEM_SHARE, across, 8);
        device.check(
            "a-range-call-ends-with-its-table",
            3,
            if first.status == SUCCESS { first.done } else { 0 },
        );
        device.check("the-caller-comes-again-for-the-rest", SUCCESS, share(TABLE_END, 5));
        device.check("unsharing-across-tables-succeeds", SUCCESS, unshare(across, 8));
        let kept = (0..8).filter(|page| load64(across + page * PAGE_SIZE) == *page);
        device.check("the-pages-keep-their-content", 8, kept.count() as u64);
    }

    fn absurd(device: &mut Device) {
        let arguments = [
            (RANGE, 1 << 52, 0),
            (RANGE, u64::MAX, 0),
            (RANGE, 1 << 63, 0),
            (RANGE + 8, 1, 0),
            (RANGE + 0x800, 1, 0),
            (RANGE, 1, 1),
            (1 << 40, 1, 0),
            (!0xfff, 1, 0),
            (!0xfff, 2, 0),
        ];
        for (function, name) in [
            (MEM_SHARE, "absurd-shares-are-refused"),
            (MEM_UNSHARE, "absurd-unshares-are-refused"),
            (MEM_RELINQUISH, "absurd-relinquishes-are-refused"),
        ] {
            let refused = arguments.into_iter().filter(|(a, b, c)| {
                let [x0, ..] = call(function, *a, *b, *c);
                x0 == INVALID_PARAMETER
            });
            device.check(name, arguments.len() as u64, refused.count() as u64);
        }
        device.check("sharing-a-device-is-refused", INVALID_PARAMETER, share(DEVICE_BASE, 1));
    }

    /// The host takes the first of two pages: the guest is told as of memory that has failed, and keeps the other.
    fn taken_by_force(device: &mut Device) {
        store64(GIVEN, GREETING);
        store64(GIVEN + PAGE_SIZE, GREETING);
        device.phase(3, &[GIVEN, 2]);
        let external = CLASS_DATA_ABORT << 8 | STATUS_EXTERNAL;
        let seen =
            |access: fn()| attempt(access).err().map_or(0, |fault| fault.class() << 8 | fault.status());
        device.check("a-load-from-poison-is-an-external-abort", external, seen(|| _ = load64(GIVEN)));
        device.check("a-store-to-poison-is-an-external-abort", external, seen(|| store64(GIVEN, GREETING)));
        device.check("sharing-poison-is-refused", INVALID_PARAMETER, share(GIVEN, 1));
        device.check("sharing-over-poison-is-refused", INVALID_PARAMETER, share(GIVEN, 2));
        device.check("unsharing-poison-is-refused", INVALID_PARAMETER, unshare(GIVEN, 1));
        device.check("relinquishing-poison-is-refused", INVALID_PARAMETER, relinquish(GIVEN, 1));
        let [enrolled, ..] = call(MMIO_GUARD_MAP, GIVEN, 1, 0);
        device.check("poison-does-not-become-a-device", INVALID_PARAMETER, enrolled);
        device.check("the-page-behind-it-keeps-its-content", GREETING, load64(GIVEN + PAGE_SIZE));
    }

    fn given_back(device: &mut Device) {
        store64(GIVEN, GREETING);
        store64(GIVEN + PAGE_SIZE, GREETING);
        device.check("relinquishing-two-pages-succeeds", SUCCESS, relinquish(GIVEN, 2));
        device.phase(2, &[GIVEN, 2]);
        device.check("a-relinquished-page-comes-back-empty", 0, load64(GIVEN));
        device.check("and-what-the-host-wrote-meanwhile-is-there", GREETING, load64(GIVEN + PAGE_SIZE));
    }
}
