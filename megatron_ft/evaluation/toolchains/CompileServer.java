import java.io.*;
import java.net.URI;
import java.nio.charset.StandardCharsets;
import java.util.*;
import javax.tools.*;

/**
 * Compiles one program after the other in one process; starting a compiler takes most of its time.
 *
 * <p>Request on stdin: length of the source (int), source in UTF-8. Answer on stdout: number of
 * classes (int), or -1 if the source does not compile, then that many times name (UTF), length
 * (int), bytes. No annotation processor runs, so that no code of the program does.
 */
public class CompileServer {
    static class Source extends SimpleJavaFileObject {
        private final String text;

        Source(String text) {
            super(URI.create("string:///Main.java"), Kind.SOURCE);
            this.text = text;
        }

        @Override
        public CharSequence getCharContent(boolean ignoreEncodingErrors) {
            return text;
        }
    }

    static class Classes extends ForwardingJavaFileManager<JavaFileManager> {
        final Map<String, ByteArrayOutputStream> written = new TreeMap<>();

        Classes(JavaFileManager manager) {
            super(manager);
        }

        @Override
        public JavaFileObject getJavaFileForOutput(Location location, String name, JavaFileObject.Kind kind, FileObject sibling) {
            ByteArrayOutputStream bytes = new ByteArrayOutputStream();
            written.put(name.replace('.', '/') + kind.extension, bytes);
            return new SimpleJavaFileObject(URI.create("memory:///" + name.replace('.', '/') + kind.extension), kind) {
                @Override
                public OutputStream openOutputStream() {
                    return bytes;
                }
            };
        }
    }

    public static void main(String[] arguments) throws IOException {
        JavaCompiler compiler = ToolProvider.getSystemJavaCompiler();
        JavaFileManager files = compiler.getStandardFileManager(null, null, StandardCharsets.UTF_8);
        DataInputStream input = new DataInputStream(new BufferedInputStream(System.in));
        DataOutputStream output = new DataOutputStream(new BufferedOutputStream(System.out));
        List<String> options = List.of("-proc:none", "-nowarn", "-Xlint:none", "-implicit:none");
        while (true) {
            byte[] source;
            try {
                source = input.readNBytes(input.readInt());
            } catch (EOFException end) {
                return;
            }
            Classes classes = new Classes(files);
            Source program = new Source(new String(source, StandardCharsets.UTF_8));
            boolean compiled = compiler.getTask(Writer.nullWriter(), classes, d -> {}, options, null, List.of(program)).call();
            output.writeInt(compiled ? classes.written.size() : -1);
            if (compiled) {
                for (Map.Entry<String, ByteArrayOutputStream> entry : classes.written.entrySet()) {
                    output.writeUTF(entry.getKey());
                    output.writeInt(entry.getValue().size());
                    entry.getValue().writeTo(output);
                }
            }
            output.flush();
        }
    }
}
