-- CommitPack's metadata: commits that modified exactly one file, and that is a regular file with
-- other contents than before. The license is that of the first repository.
WITH single_file AS (
  SELECT files.*
  FROM commits_table_dedup_files AS files
  WHERE TRUE  -- QUALIFY needs a WHERE
  QUALIFY COUNT(*) OVER (PARTITION BY files.commit) = 1
)
SELECT
  single_file.commit,
  single_file.subject,
  single_file.message,
  single_file.repos,
  SPLIT(single_file.licenses, ',')[OFFSET(0)] AS license,
  single_file.licenses,
  single_file.old_file,
  single_file.new_file,
  single_file.old_sha1,
  single_file.new_sha1
FROM single_file
WHERE single_file.old_mode IN (33188, 33261)  -- 100644 and 100755: no symbolic link, no submodule
  AND single_file.new_mode IN (33188, 33261)
  AND single_file.old_sha1 != single_file.new_sha1
