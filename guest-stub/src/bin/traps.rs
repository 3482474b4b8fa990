//! System registers and instructions that a protected guest must not reach, what identification registers
//! say, and waits that exit.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
guest_stub::guest!(image::main);

#[cfg(target_os = "none")]
mod image {
    use guest_stub::arch::{CLASS_UNKNOWN, attempt, wait_for_event, wait_for_interrupt};
    use guest_stub::device::Device;
    use guest_stub::{read_register, write_register};

    pub(super) fn main(_argument: u64) {
        let mut device = Device::enrol();
        undefined(&mut device);
        identification(&mut device);
        harmless(&mut device);
        wait_for_interrupt();
        device.check("wfi-ends", 0, 0);
        wait_for_event();
        device.check("wfe-ends", 0, 0);
    }

    /// 1 if an attempt ended in an UNDEFINED exception, else 0.
    fn is_undefined<T>(action: impl FnOnce() -> T) -> u64 {
        attempt(action).map_or_else(|fault| u64::from(fault.class() == CLASS_UNKNOWN), |_| 0)
    }

    macro_rules! reads {
        ($device:ident: $($name:literal $register:literal,)*) => {$(
            $device.check(concat!("reading-", $name, "-is-undefined"), 1, is_undefined(|| read_register!($register)));
        )*};
    }

    fn undefined(device: &mut Device) {
        // The guest's own CPACR_EL1 must not be what stops it: FPEN, ZEN and SMEN allow everything.
        write_register!("cpacr_el1", 3 << 16 | 3 << 20 | 3 << 24);
        reads! { device:
            "icc-iar1-el1" "s3_0_c12_c12_0",
            "icc-pmr-el1" "s3_0_c4_c6_0",
            "icc-ctlr-el1" "s3_0_c12_c12_4",
            "icc-igrpen1-el1" "s3_0_c12_c12_7",
            "pmcr-el0" "s3_3_c9_c12_0",
            "pmccntr-el0" "s3_3_c9_c13_0",
            "pmintenset-el1" "s3_0_c9_c14_1",
            "pmevcntr0-el0" "s3_3_c14_c8_0",
            "pmsidr-el1" "s3_0_c9_c9_7",
            "trblimitr-el1" "s3_0_c9_c11_0",
            "trcoslsr" "s2_1_c1_c1_4",
            "cntp-ctl-el0" "s3_3_c14_c2_1",
            "cntp-cval-el0" "s3_3_c14_c2_2",
            "zcr-el1" "s3_0_c1_c2_0",
            "smcr-el1" "s3_0_c1_c2_6",
            "svcr" "s3_3_c4_c2_2",
            "gcr-el1" "s3_0_c1_c0_6",
            "tfsr-el1" "s3_0_c5_c6_0",
            "erridr-el1" "s3_0_c5_c3_0",
            "lorsa-el1" "s3_0_c10_c4_0",
            "dbgbvr9-el1" "s2_0_c0_c9_4",
            "s3-3-c15-c0-0" "s3_3_c15_c0_0",
            "hcr-el2" "s3_4_c1_c1_0",
            "vttbr-el2" "s3_4_c2_c1_0",
        }
        // Where ICC_SRE_EL2 is fixed, as in QEMU, this one cannot be trapped: then it must be fixed, too.
        let sre = attempt(|| read_register!("s3_0_c12_c12_5")).unwrap_or(7);
        device.check("icc-sre-el1-is-undefined-or-fixed", 7, sre);
        let sgi = is_undefined(|| write_register!("s3_0_c12_c11_5", 1));
        device.check("writing-icc-sgi1r-el1-is-undefined", 1, sgi);
        let id = is_undefined(|| write_register!("s3_0_c0_c4_0", 0));
        device.check("writing-an-identification-register-is-undefined", 1, id);
        device.check("dc-isw-is-undefined", 1, is_undefined(set_way));
        device.check("an-sve-instruction-is-undefined", 1, is_undefined(read_vector_length));
    }

    fn set_way() {
        // SAFETY: the guest has no dirty line that it would miss; the instruction must not be executed anyway.
        unsafe { core::arch::asm!("dc isw, xzr", options(nostack)) };
    }

    fn read_vector_length() {
        // SAFETY: RDVL X0, #1 writes x0 only; it is given by its encoding.
        unsafe { core::arch::asm!(".inst 0x04bf5020", out("x0") _, options(nostack)) };
    }

    fn identification(device: &mut Device) {
        let field = |value: u64, shift: u32| value >> shift & 0xf;
        let pfr0 = read_register!("s3_0_c0_c4_0");
        device.check("no-aarch32-at-el0", 1, field(pfr0, 0));
        device.check("no-gic-system-registers", 0, field(pfr0, 24));
        device.check("no-sve", 0, field(pfr0, 32));
        device.check("no-el2", 0, field(pfr0, 8));
        let pfr1 = read_register!("s3_0_c0_c4_1");
        device.check("no-mte", 0, field(pfr1, 8));
        device.check("no-sme", 0, field(pfr1, 24));
        let dfr0 = read_register!("s3_0_c0_c5_0");
        device.check("no-pmu", 0, field(dfr0, 8));
        device.check("no-spe", 0, field(dfr0, 32));
        device.check("no-trace", 0, field(dfr0, 4));
        device.check("no-sve-features", 0, read_register!("s3_0_c0_c4_4"));
        let mmfr0 = read_register!("s3_0_c0_c7_0");
        device.check("at-most-40-bits-of-addresses", 1, u64::from(field(mmfr0, 0) <= 2));
        device.check("reserved-identification-registers-are-zero", 0, read_register!("s3_0_c0_c7_7"));
    }

    /// Registers that read as nothing and drop writes.
    fn harmless(device: &mut Device) {
        write_register!("mdscr_el1", 1 << 15 | 1);
        device.check("mdscr-el1-stays-zero", 0, read_register!("mdscr_el1"));
        write_register!("s3_0_c1_c0_1", 0xffff);
        device.check("actlr-el1-stays-zero", 0, read_register!("s3_0_c1_c0_1"));
        write_register!("s2_0_c0_c0_4", 0x8000_0000);
        device.check("dbgbvr0-el1-stays-zero", 0, read_register!("s2_0_c0_c0_4"));
        device.check("mpidr-el1-is-that-of-vcpu-0", 0, read_register!("mpidr_el1") & 0xff_00ff_ffff);
        let before = read_register!("cntvct_el0");
        (0..1000).for_each(|_| core::hint::spin_loop());
        device.check("the-virtual-counter-runs", 1, u64::from(read_register!("cntvct_el0") > before));
    }
}
