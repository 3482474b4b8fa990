//! Every call that a guest may make and many that it may not, with good and with absurd arguments.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
guest_stub::guest!(image::main);

#[cfg(target_os = "none")]
mod image {
    use abi::smccc::{INVALID_PARAMETER, NOT_SUPPORTED, SUCCESS};
    use abi::{guest, psci, smccc};
    use guest_stub::arch::{hvc, hvc_immediate_1, smc};
    use guest_stub::call::call;
    use guest_stub::device::Device;
    use guest_stub::protocol::PAGE_SIZE;

    fn x0(function: u32, arguments: [u64; 3]) -> u64 {
        let [a, b, c] = arguments;
        let [x0, ..] = call(function, a, b, c);
        x0
    }

    pub(super) fn main(_argument: u64) {
        let mut device = Device::enrol();
        discovery(&mut device);
        arguments(&mut device);
        unknown(&mut device);
        conduits(&mut device);
    }

    fn discovery(device: &mut Device) {
        device.check("smccc-version", smccc::VERSION_1_1, x0(smccc::VERSION, [0; 3]));
        let feature = |function: u32| x0(smccc::ARCH_FEATURES, [u64::from(function), 0, 0]);
        device.check("arch-features-knows-the-version-call", SUCCESS, feature(smccc::VERSION));
        device.check("arch-features-knows-no-workaround", NOT_SUPPORTED, feature(0x8000_8000));
        let uid = call(smccc::VENDOR_HYP_UID, 0, 0, 0);
        let right = uid.into_iter().zip(guest::KVM_UID).filter(|(word, known)| *word == u64::from(*known));
        device.check("vendor-uid-is-kvms", 4, right.count() as u64);
        device.check("features-of-a-protected-guest", guest::PROTECTED_FEATURES, x0(guest::FEATURES, [0; 3]));
        device.check("meminfo-tells-the-granule", PAGE_SIZE, x0(guest::HYP_MEMINFO, [0; 3]));
        device.check("mmio-guard-info-tells-the-granule", PAGE_SIZE, x0(guest::MMIO_GUARD_INFO, [0; 3]));
        device.check("rubbish-above-the-function-id-is-no-part-of-it", smccc::VERSION_1_1, {
            let [x0, ..] = hvc([0xdead_beef_0000_0000 | u64::from(smccc::VERSION), 0, 0, 0, 0, 0, 0]);
            x0
        });
        let hinted = x0(smccc::VENDOR_HYP_UID | smccc::SVE_HINT, [0; 3]);
        device.check("the-sve-hint-is-no-part-of-the-function-id", u64::from(guest::KVM_UID[0]), hinted);
    }

    fn arguments(device: &mut Device) {
        let meminfo = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [u64::MAX; 3]];
        let refused = meminfo.into_iter().filter(|a| x0(guest::HYP_MEMINFO, *a) == INVALID_PARAMETER);
        device.check("meminfo-with-arguments-is-refused", meminfo.len() as u64, refused.count() as u64);
    }

    /// Function ids that are nobody's, or that Deed does not show to guests.
    const UNKNOWN: [u32; 18] = [
        0x0000_0000,
        0xffff_ffff,
        0x8000_0002,
        0x8000_8000,
        0x8000_7fff, // Arm's own, workarounds
        0x8200_0000,
        0x8400_0050,
        0xc400_0053,
        0x8400_0063,
        0xc400_0073, // SiP, TRNG, FF-A
        0xc500_0020,
        0x8500_ff01,
        0xb200_ff01,
        0xc600_000a,
        0xc600_0040, // PV time, hypervisor, trusted OS
        0x8600_0002,
        0x0600_0000,
        0x4600_0003, // KVM's numbers in the wrong calling convention
    ];

    fn unknown(device: &mut Device) {
        for function in UNKNOWN {
            let answer = x0(function, [0x8000_0000, 1, 0]);
            if answer != NOT_SUPPORTED {
                device.say(format_args!("{function:#x} answers {answer:#x}"));
            }
        }
        let served = |functions: &mut dyn Iterator<Item = u32>| {
            functions.filter(|function| x0(*function, [0; 3]) != NOT_SUPPORTED).count() as u64
        };
        device.check("unknown-calls-are-not-supported", 0, served(&mut UNKNOWN.into_iter()));
        let host_calls = &mut abi::host::CALLS.iter().map(|call| call.number);
        device.check("host-calls-are-not-the-guests", 0, served(host_calls));
        device.check("the-hosts-clock-is-what-the-host-says", NOT_SUPPORTED, x0(guest::PTP, [0; 3]));
    }

    fn conduits(device: &mut Device) {
        device.check("hvc-1-is-no-call", NOT_SUPPORTED, hvc_immediate_1(smccc::VERSION));
        for (name, function) in
            [("smc-of-psci-is-no-call", psci::VERSION), ("smc-of-trng-is-no-call", 0x8400_0050)]
        {
            device.check(name, NOT_SUPPORTED, smc(function));
        }
    }
}
