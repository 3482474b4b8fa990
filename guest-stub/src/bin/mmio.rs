//! Accesses to devices: sizes and extensions, what cannot be shown to a host, and what is not enrolled.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
guest_stub::guest!(image::main);

#[cfg(target_os = "none")]
mod image {
    use abi::guest::{MMIO_GUARD_ENROLL, MMIO_GUARD_MAP, MMIO_GUARD_UNMAP};
    use abi::smccc::{INVALID_PARAMETER, SUCCESS};
    use guest_stub::arch::{self, CLASS_DATA_ABORT, STATUS_EXTERNAL, attempt};
    use guest_stub::call::{call, range};
    use guest_stub::device::Device;
    use guest_stub::protocol::{DEVICE_BASE, RAM_BASE, SCRATCH, STRANGER_BASE};

    const REGISTER: u64 = DEVICE_BASE + SCRATCH;
    const PATTERN: u64 = 0x8899_aabb_ccdd_eeff;

    type Load = fn(u64) -> u64;

    pub(super) fn main(argument: u64) {
        match argument {
            0 => enrolled(),
            1 => {
                Device::enrol().phase(1, &[STRANGER_BASE]);
                arch::store64(STRANGER_BASE, PATTERN);
            }
            2 => {
                let mut device = Device::enrol();
                device.phase(1, &[DEVICE_BASE]);
                call(MMIO_GUARD_UNMAP, DEVICE_BASE, 1, 0);
                arch::store64(REGISTER, PATTERN);
            }
            3 => arch::store64(REGISTER, PATTERN),
            _ => unguarded(),
        }
    }

    fn enrolled() {
        let mut device = Device::enrol();
        device.check("enrolling-again-succeeds", SUCCESS, range(MMIO_GUARD_ENROLL, 0, 0).status);
        sizes(&mut device);
        extensions(&mut device);
        without_syndrome(&mut device);
        mappings(&mut device);
    }

    fn unguarded() {
        let mut device = Device::unguarded();
        sizes(&mut device);
        extensions(&mut device);
    }

    fn sizes(device: &mut Device) {
        arch::store64(REGISTER, PATTERN);
        device.check("store-and-load-of-8-bytes", PATTERN, arch::load64(REGISTER));
        arch::store32(REGISTER, !0);
        device.check("store-of-4-bytes", 0x8899_aabb_ffff_ffff, arch::load64(REGISTER));
        arch::store16(REGISTER + 4, 0x1234);
        device.check("store-of-2-bytes", 0x8899_1234_ffff_ffff, arch::load64(REGISTER));
        arch::store8(REGISTER + 7, 0xabcd);
        device.check("store-of-1-byte", 0xcd99_1234_ffff_ffff, arch::load64(REGISTER));
        arch::store64_zero_register(REGISTER);
        device.check("store-of-the-zero-register", 0, arch::load64(REGISTER));
        arch::store64(REGISTER, PATTERN);
        arch::load64_zero_register(REGISTER);
        device.check("load-of-4-bytes", 0xccdd_eeff, arch::load32(REGISTER));
        device.check("load-of-2-bytes", 0xeeff, arch::load16(REGISTER));
        device.check("load-of-1-byte", 0xff, arch::load8(REGISTER));
    }

    fn extensions(device: &mut Device) {
        device.check("signed-load-of-4-bytes", 0xffff_ffff_ccdd_eeff, arch::load32_signed(REGISTER));
        device.check("signed-load-of-2-bytes", 0xffff_ffff_ffff_eeff, arch::load16_signed(REGISTER));
        device.check("signed-load-of-1-byte", 0xffff_ffff_ffff_ffff, arch::load8_signed(REGISTER));
        device.check("signed-load-of-2-bytes-to-32-bits", 0xffff_eeff, arch::load16_signed_32(REGISTER));
        device.check("signed-load-of-1-byte-to-32-bits", 0xffff_ffff, arch::load8_signed_32(REGISTER));
        arch::store8(REGISTER, 0x7f);
        device.check("signed-load-of-a-positive-byte", 0x7f, arch::load8_signed(REGISTER));
    }

    /// Accesses that say too little of themselves are external aborts to the guest: the host sees nothing.
    fn without_syndrome(device: &mut Device) {
        let accesses: [(&str, Load); 2] = [
            ("a-load-of-a-pair-is-an-external-abort", arch::load_pair),
            ("a-load-exclusive-is-an-external-abort", arch::load_exclusive),
        ];
        for (name, access) in accesses {
            let fault = attempt(|| access(REGISTER)).err();
            let seen = fault.map_or(0, |fault| fault.class() << 8 | fault.status());
            device.check(name, CLASS_DATA_ABORT << 8 | STATUS_EXTERNAL, seen);
            let address = fault.map_or(0, |fault| fault.address);
            if address != REGISTER {
                device.say(format_args!("{name}: FAR {address:#x}"));
            }
        }
    }

    fn mappings(device: &mut Device) {
        let page = RAM_BASE + 0x10_0000;
        arch::store64(page, PATTERN);
        device.check(
            "memory-cannot-become-a-device",
            INVALID_PARAMETER,
            range(MMIO_GUARD_MAP, page, 1).status,
        );
        device.check(
            "memory-is-no-device-to-unmap",
            INVALID_PARAMETER,
            range(MMIO_GUARD_UNMAP, page, 1).status,
        );
        device.check("memory-stays-memory", PATTERN, arch::load64(page));
        let unaligned = range(MMIO_GUARD_MAP, STRANGER_BASE + 8, 1).status;
        device.check("a-device-begins-with-a-page", INVALID_PARAMETER, unaligned);
        let beyond = range(MMIO_GUARD_MAP, 1 << 40, 1).status;
        device.check("a-device-lies-within-the-address-space", INVALID_PARAMETER, beyond);
        let huge = range(MMIO_GUARD_MAP, STRANGER_BASE, 1 << 52).status;
        device.check("a-device-is-no-2-to-the-52-pages", INVALID_PARAMETER, huge);
        device.check(
            "a-second-device-can-be-mapped",
            SUCCESS,
            range(MMIO_GUARD_MAP, STRANGER_BASE, 1).status,
        );
        device.check("and-unmapped", SUCCESS, range(MMIO_GUARD_UNMAP, STRANGER_BASE, 1).status);
        device.check("the-first-one-still-works", 0x8899_aabb_ccdd_ee7f, arch::load64(REGISTER));
    }
}
