//! Reads and writes every system register that there can be, known or not, and looks whether what it wrote
//! is still there after another guest has done the same. A register that two guests can reach and that is
//! neither switched nor trapped carries the other one's value.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
guest_stub::guest!(image::main);

#[cfg(target_os = "none")]
mod image {
    use guest_stub::arch::{attempt, call_code, load64, store64};
    use guest_stub::device::Device;
    use guest_stub::protocol::RAM_BASE;
    use guest_stub::write_register;

    /// Where the instructions are put together.
    const CODE: u64 = RAM_BASE + 0x10_0000;
    /// A word for each register: the value that stuck, and whether any did.
    const VALUES: u64 = RAM_BASE + 0x18_0000;
    const STUCK: u64 = RAM_BASE + 0x1c_0000;

    /// Encodings: op1 0 to 3 of op0 3, then op1 0 and 3 of op0 2 (debug).
    const ENCODINGS: u32 = 6 << 11;

    const MRS_X0: u32 = 0xd530_0000;
    const MSR_X0: u32 = 0xd510_0000;
    const RET: u32 = 0xd65f_03c0;

    /// A register, by its place in the survey.
    #[derive(Clone, Copy, PartialEq, Eq)]
    struct Register(u32);

    impl Register {
        fn fields(self) -> [u32; 5] {
            let (op0, op1) = match self.0 >> 11 {
                group @ 0..=3 => (3, group),
                4 => (2, 0),
                _ => (2, 3),
            };
            [op0, op1, self.0 >> 7 & 0xf, self.0 >> 3 & 0xf, self.0 & 7]
        }

        /// The fields in an MRS or MSR instruction.
        fn bits(self) -> u32 {
            let [op0, op1, crn, crm, op2] = self.fields();
            (op0 & 1) << 19 | op1 << 16 | crn << 12 | crm << 8 | op2 << 5
        }

        /// What a guest cannot change without losing itself, what exceptions change, and the clock.
        fn is_left_alone(self) -> bool {
            matches!(
                self.fields(),
                [3, 0, 1, 0, 0 | 2]         // SCTLR_EL1, CPACR_EL1
                    | [3, 0, 2, 0, 0 | 2]   // TTBR0_EL1, TCR_EL1
                    | [3, 0, 10, 2, 0]      // MAIR_EL1
                    | [3, 0, 12, 0, 0]      // VBAR_EL1
                    | [3, _, 4, 2, _]       // processor state
                    | [3, 0, 4, 0, 0 | 1]   // SPSR_EL1, ELR_EL1
                    | [3, 0, 5, 2, 0]       // ESR_EL1
                    | [3, 0, 6, 0, 0]       // FAR_EL1
                    | [3, 3, 14, 3, 0 | 1] // CNTV_TVAL_EL0, CNTV_CTL_EL0: they change with time
            )
        }

        fn read(self) -> Option<u64> {
            attempt(|| call_code(CODE, [MRS_X0 | self.bits(), RET], 0)).ok()
        }

        fn write(self, value: u64) -> bool {
            attempt(|| call_code(CODE, [MSR_X0 | self.bits(), RET], value)).is_ok()
        }

        fn pattern(self, seed: u64) -> u64 {
            (seed ^ u64::from(self.0)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        }

        fn stuck(self) -> bool {
            load64(STUCK + 8 * u64::from(self.0)) != 0
        }
    }

    fn registers() -> impl Iterator<Item = Register> {
        (0..ENCODINGS).map(Register).filter(|register| !register.is_left_alone())
    }

    pub(super) fn main(_argument: u64) {
        let mut device = Device::enrol();
        let seed = device.value(0);
        // FPEN, ZEN and SMEN: what stops the guest must not be its own choice.
        write_register!("cpacr_el1", 3 << 16 | 3 << 20 | 3 << 24);
        let mut count = 0;
        for register in registers() {
            let Some(before) = register.read() else { continue };
            let stuck = register.write(register.pattern(seed)) && register.read() != Some(before);
            store64(STUCK + 8 * u64::from(register.0), u64::from(stuck));
            count += u64::from(stuck);
        }
        // A second look, when all have been written: some registers are views of others.
        for register in registers().filter(|register| register.stuck()) {
            store64(VALUES + 8 * u64::from(register.0), register.read().unwrap_or(0));
        }
        device.say(format_args!("{count} registers keep what is written to them"));
        device.phase(1, &[count]);

        let mut lost = 0;
        for register in registers().filter(|register| register.stuck()) {
            let value = register.read();
            if value != Some(load64(VALUES + 8 * u64::from(register.0))) {
                let [op0, op1, crn, crm, op2] = register.fields();
                device.say(format_args!("s{op0}_{op1}_c{crn}_c{crm}_{op2} has changed"));
                lost += 1;
            }
        }
        device.check("every-register-survives-the-other-guest", 0, lost);
    }
}
